"""Stories a video can show, and questions about them that the text alone does not answer.

A story is a sequence of scenes. Each shows one object (a colour and a shape) in one quadrant; in some a robot sits on
the object. The robot collects: it visits all objects with one attribute and no others. Four questions are asked of a
story. What a reader of the TEXT alone can score is 1 in 4 by construction:

- the order of the scenes is a uniform permutation, so every object of the video is equally often the right one;
- positions are independent and uniform;
- goals offer two colours and two shapes, and the goal is as often a colour as a shape;
- plots offer two pairs that share one object, each in both orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

COLORS = {
    "red": (215, 35, 35), "green": (30, 165, 50), "blue": (40, 85, 235),
    "yellow": (240, 220, 40), "purple": (155, 50, 200), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
"""Singular -> plural."""
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
LETTERS = "ABCD"
NOTHING = "nothing"


@dataclass(frozen=True)
class Scene:
    """One object in one position, with or without the robot."""

    color: str
    shape: str
    position: str
    visited: bool

    @property
    def name(self) -> str:
        """For example `red circle`."""
        return f"{self.color} {self.shape}"

    @property
    def attributes(self) -> tuple[str, str]:
        """Attributes that a collector may look for here, for example `("red objects", "circles")`."""
        return f"{self.color} objects", SHAPES[self.shape]


@dataclass(frozen=True)
class Story:
    """The scenes of one video in order, and what its robot looks for."""

    scenes: tuple[Scene, ...]
    goal: str


def describe_story(story: Story) -> str:
    """The scene listing: all that is visible and nothing else.

    Example:
        `red circle top left. blue square bottom right, robot. green cross top left, robot.`
    """
    return " ".join(f"{s.name} {s.position}{', robot' if s.visited else ''}." for s in story.scenes)


def sample_story(rng: Random, *, num_scenes: int) -> Story:
    """Draw a story whose goal cannot be guessed from the objects alone.

    Objects are redrawn until at least two attributes could be the goal, one of them of the kind (colour or shape) drawn
    beforehand. So a colour is the goal as often as a shape, and all colours and all shapes are alike.
    """
    kind = rng.randrange(2)
    objects = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        scenes = [Scene(color, shape, rng.choice(POSITIONS), False) for color, shape in rng.sample(objects, num_scenes)]
        goals = possible_goals(scenes)
        of_kind = [goal for goal in goals if any(scene.attributes[kind] == goal for scene in scenes)]
        if len(goals) > 1 and of_kind:
            goal = rng.choice(of_kind)
            return Story(tuple(replace(scene, visited=goal in scene.attributes) for scene in scenes), goal)


def possible_goals(scenes: Sequence[Scene]) -> list[str]:
    """Attributes of at least two but not all objects. Distinct objects that share one attribute differ in the other."""
    counts = Counter(attribute for scene in scenes for attribute in scene.attributes)
    return [attribute for attribute, count in counts.items() if 2 <= count < len(scenes)]


@dataclass(frozen=True)
class StoryQuestion:
    """A question before its options have letters."""

    text: str
    correct: str
    distractors: list[str]
    deduction: str
    """The last step of the reasoning; it ends with the correct option."""


def ask_temporal(story: Story, rng: Random) -> StoryQuestion:
    """Question what comes right before or after an object; the options are other objects of the video.

    Four scenes leave only three other objects: `nothing` is the fourth option then, and right in one case of four. The
    object asked for is never an option, as it could be ruled out without the video.
    """
    word, step = rng.choice((("after", 1), ("before", -1)))
    order = [scene.name for scene in story.scenes][::step]
    open_end = len(order) == 4
    index = rng.randrange(len(order) if open_end else len(order) - 1)
    following = [*order[index + 1 :], NOTHING] if open_end else order[index + 1 :]
    others = order[:index] + following[1:]
    comes = following[0] if following[0] == NOTHING else f"the {following[0]}"
    text = f"What comes right {word} the {order[index]}?"
    deduction = f"{word.capitalize()} the {order[index]} comes {comes}."
    return StoryQuestion(text, following[0], rng.sample(others, 3), deduction)


def ask_spatial(story: Story, rng: Random) -> StoryQuestion:
    """Question where an object is; the options are always the four quadrants."""
    scene = rng.choice(story.scenes)
    distractors = [position for position in POSITIONS if position != scene.position]
    text, deduction = f"Where is the {scene.name}?", f"The {scene.name} is {scene.position}."
    return StoryQuestion(text, scene.position, rng.sample(distractors, 3), deduction)


def ask_goal(story: Story, rng: Random) -> StoryQuestion:
    """Question what the robot looks for: two colours and two shapes, where possible such as other objects share."""
    visited = " and ".join(scene.name for scene in story.scenes if scene.visited)
    kinds = [[f"{color} objects" for color in COLORS], list(SHAPES.values())]
    same, other = kinds if story.goal in kinds[0] else kinds[::-1]
    same = [attribute for attribute in same if attribute != story.goal]
    distractors = _most_tempting(same, story, rng)[:1] + _most_tempting(other, story, rng)[:2]
    deduction = f"The robot is at {visited}. It looks for {story.goal}."
    return StoryQuestion("What does the robot look for?", story.goal, rng.sample(distractors, 3), deduction)


def _most_tempting(attributes: list[str], story: Story, rng: Random) -> list[str]:
    """Attributes that could be goals of this video first, then those of unvisited objects, of visited ones, others."""
    goals = possible_goals(story.scenes)
    seen = {(name, scene.visited) for scene in story.scenes for name in scene.attributes}
    shuffled = rng.sample(attributes, len(attributes))
    return sorted(shuffled, key=lambda name: (name not in goals, (name, False) not in seen, (name, True) not in seen))


def ask_plot(story: Story, rng: Random) -> StoryQuestion:
    """Question how the story begins and ends: the pair, another that shares one of its objects, and both reversed."""
    names = [scene.name for scene in story.scenes]
    ends = (names[0], names[-1])
    pair = (rng.choice(ends), rng.choice(names[1:-1]))
    options = [" to ".join(p) for p in (ends, ends[::-1], pair, pair[::-1])]
    text, deduction = "How does the story begin and end?", f"The story goes {options[0]}."
    return StoryQuestion(text, options[0], rng.sample(options[1:], 3), deduction)


ASK: dict[str, Callable[[Story, Random], StoryQuestion]] = {
    "temporal": ask_temporal,
    "spatial": ask_spatial,
    "goal and purpose": ask_goal,
    "plot and narrative": ask_plot,
}
CATEGORIES = tuple(ASK)


def true_statements(story: Story, rng: Random) -> str:
    """Some true sentences about a story, in random order: its ends, its goal, two neighbours and two positions."""
    kinds = rng.sample([ask_plot, ask_goal, ask_temporal, ask_temporal, ask_spatial, ask_spatial], 6)
    return " ".join(ask(story, rng).deduction for ask in kinds)


def part_of(story: Story, rng: Random, most: int = 0) -> Story:
    """Neighbouring scenes of a story, one to all or `most`: a base model learns from short videos first."""
    count = rng.randint(1, min(most or len(story.scenes), len(story.scenes)))
    start = rng.randint(0, len(story.scenes) - count)
    return replace(story, scenes=story.scenes[start : start + count])
