"""An OpenAI-compatible server that answers from what the generated videos show, with faults: a process of its own.

    python -m tests.pipeline.server FAULT_RATE DELAY_S

prints its port. It looks at the frames (stories.py says what can be seen), writes captions, reads them again in the
prompts of later steps, and knows the answers to questions about the story. Every call is counted under the hash of its
body; `GET /calls` tells them. What a call gets is decided by that hash alone, so it is the same whatever the order.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
from PIL import Image

from longrl.testing.drawing import shape_mask
from longrl.testing.stories import ASK, COLORS, POSITIONS, SHAPES, Scene, Story, describe_story, possible_goals

FAULTS = ("429", "500", "cut", "html", "hang", "drop")
"""Of the transport: repeated by the client."""
ODD = ("refusal", "empty", "garbage")
"""Of the model: asked again with another seed."""
HANG_S = 6.0
SEEN = re.compile(r"(\w+) (circle|square|triangle|cross) (top left|top right|bottom left|bottom right)(, robot)?\.")


# ---- what it sees ----


def look(image: Image.Image) -> Scene | None:
    """The object in a frame; None if there is none."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    best = max(COLORS, key=lambda color: _near(pixels, COLORS[color]).sum())
    mask = _near(pixels, COLORS[best])
    if mask.sum() < 0.01 * mask.size:
        return None
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    place = POSITIONS[2 * ((top + bottom) > len(mask)) + ((left + right) > len(mask))]
    radius = max(bottom - top, right - left) // 2
    shape = max(SHAPES, key=lambda name: _overlap(mask, name, (top + bottom) // 2, (left + right) // 2, radius))
    middle = (top + bottom) // 2, (left + right) // 2
    robot = pixels[middle[0] - 2 : middle[0] + 3, middle[1] - 2 : middle[1] + 3].max(axis=-1).mean() < 90  # it is black
    return Scene(best, shape, place, bool(robot))


def _near(pixels, color) -> np.ndarray:
    return np.abs(pixels - np.array(color)).max(axis=-1) < 60


def _overlap(mask, shape: str, row: int, column: int, radius: int) -> float:
    drawn = np.pad(np.zeros_like(mask), radius)
    drawn[row : row + 2 * radius + 1, column : column + 2 * radius + 1] = shape_mask(shape, radius)
    drawn = drawn[radius:-radius, radius:-radius]
    return (mask & drawn).sum() / (mask | drawn).sum()


def story_of(scenes: list[Scene]) -> Story:
    """The story that a list of scenes tells."""
    visited = [scene for scene in scenes if scene.visited]
    goals = [goal for goal in possible_goals(scenes) if {s.name for s in scenes if goal in s.attributes} ==
             {s.name for s in visited}]  # fmt: skip
    return Story(tuple(scenes), goals[0] if goals else "circles")


def told_scenes(text: str) -> list[Scene]:
    """Scenes of a text that this server wrote, each once."""
    found = [Scene(color, shape, place, bool(robot)) for color, shape, place, robot in SEEN.findall(text)]
    return list(dict.fromkeys(found))


# ---- what it says ----


def say(text: str, images: list[Image.Image], rng: Random) -> str:
    if text.startswith("These are frames of a clip"):
        scenes = list(dict.fromkeys(scene for image in images if (scene := look(image))))
        return " ".join(describe_story(Story((scene,), "")) for scene in scenes) or "An empty room."
    if text.startswith("Below are notes on neighbouring stretches"):
        return describe_story(Story(tuple(told_scenes(text)), ""))
    if text.startswith("Below are notes on a video"):
        return ask(text, rng)
    if text.startswith("Somebody watched a video"):
        steps = re.findall(r"s\] (.*)", text)
        return "I look at the scenes one after the other. " + " ".join(steps)
    if text.startswith("You grade an answer"):
        tags = ("reference_answer", "answer_to_grade")
        parts = [re.search(rf"<{tag}>\s*(.*?)\s*</{tag}>", text, re.DOTALL)[1] for tag in tags]
        return f"They are compared.\nSCORE: {int(parts[0].lower() in parts[1].lower())}"
    return answer(text, images, rng)


CATEGORY = {"time": "temporal", "space": "spatial"}


def ask(text: str, rng: Random) -> str:
    """A question about the story in the notes; now and then with a fault that `validate` must find."""
    scenes = told_scenes(text)
    lines = re.findall(r"\[([\d.]+) s to ([\d.]+) s\] (.*)", text)
    kind = re.search(r"Kind of question: ([a-z ]+)\.", text)[1]
    category = CATEGORY.get(kind, kind)
    found = ASK[category](story_of(scenes), rng)
    steps = [{"start": float(a), "end": float(b), "text": f"I see {said}"} for a, b, said in lines]
    steps[-1]["text"] += f" {found.deduction}"
    options = rng.sample([found.correct, *found.distractors], 4)
    reply = {"question": found.text, "options": options, "answer": found.correct, "reasoning": steps}
    if '"options"' not in text:
        question = found.text.replace("?", ", and nothing else?")
        reply = {"question": question, "answer": found.correct, "reasoning": steps}
    odd = rng.random()
    if odd < 0.04:
        steps[0]["end"] = 1e6
    elif odd < 0.08:
        reply["question"] += f" It is {found.correct}, is it not?"
    elif odd < 0.12 and "options" in reply:
        reply["options"][options.index(found.correct)] += " as everybody can see who watches the video to its end"
        reply["answer"] = max(reply["options"], key=len)
    elif odd < 0.2 and "options" in reply:
        reply["answer"] = "something else"
    return "Here it is:\n```json\n" + json.dumps(reply, indent=1) + "\n```"


def answer(text: str, images: list[Image.Image], rng: Random) -> str:
    """A policy that is right in about half of its answers with a video, and guesses without."""
    question, options = text.splitlines()[0], dict(re.findall(r"^([A-H])\. (.*)$", text, re.MULTILINE))
    if not images:
        return f"<think>I cannot see.</think><answer>{rng.choice(sorted(options) or ['a thing'])}</answer>"
    scenes = list(dict.fromkeys(scene for image in images if (scene := look(image))))
    said = solve(question.replace(", and nothing else", ""), story_of(scenes))
    letter = next((letter for letter, option in options.items() if option == said), None)
    if rng.random() < 0.5:
        said = letter = rng.choice(sorted(options) or ["I do not know"])
    return f"<think>{describe_story(Story(tuple(scenes), ''))}</think><answer>{letter or said}</answer>"


def solve(question: str, story: Story) -> str:
    names = [scene.name for scene in story.scenes]
    if match := re.match(r"What comes right (after|before) the (.*)\?", question):
        order = names if match[1] == "after" else names[::-1]
        following = [*order, "nothing"]
        return following[following.index(match[2]) + 1] if match[2] in order else "nothing"
    if match := re.match(r"Where is the (.*)\?", question):
        return next((scene.position for scene in story.scenes if scene.name == match[1]), "nowhere")
    if question.startswith("What does the robot"):
        return story.goal
    return f"{names[0]} to {names[-1]}" if names else ""


# ---- how it is reached ----


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            self._send(200, json.dumps(self.server.calls).encode())

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(content)
        key = self.headers.get("Idempotency-Key")
        rng = Random(hashlib.sha256(content).hexdigest())
        fault = rng.choices(FAULTS, (4, 4, 4, 4, 2, 4))[0] if rng.random() < self.server.fault_rate else None
        odd = rng.choice(ODD) if rng.random() < self.server.fault_rate and body.get("seed", 0) % 10 == 0 else None
        with self.server.lock:
            known = [call for call in self.server.calls if call[0] == key]
            fault = None if known else fault
            self.server.calls.append([key, fault or "answered"])
        time.sleep(self.server.delay_s)
        if fault:
            self._fault(fault)
        else:
            self._answer(body, odd, rng)

    def _fault(self, fault: str) -> None:
        if fault in ("429", "500"):
            self._send(int(fault), b'{"error": {"message": "later"}}', {"Retry-After": "0"})
        elif fault == "cut":
            self._send(200, b'{"choices": [{"message": {"content": "half of')
        elif fault == "html":
            self._send(200, b"<html>Bad gateway</html>")
        elif fault == "hang":
            time.sleep(HANG_S)
            self.close_connection = True
        else:
            self.close_connection = True  # without a word

    def _answer(self, body, odd: str | None, rng: Random) -> None:
        content = body["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part["type"] == "text"]
        texts = [text for text in texts if not re.fullmatch(r"\[[\d.]+ s\]", text)]
        images = [_image(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        text = "\n".join(texts)
        said = {
            "refusal": "I'm sorry, but I can't help with that.",
            "empty": "",
            "garbage": "asdf {{ \u4f60\u597d \x07 }} <answer>",
            None: None,
        }[odd]
        undetectable = "You grade" in text or (odd == "garbage" and "JSON" not in text)
        said = say(text, images, rng) if said is None or undetectable else said
        message = {"role": "assistant", "content": said}
        usage = {"prompt_tokens": len(text) // 4 + 100 * len(images), "completion_tokens": len(said) // 4}
        answer = {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, content: bytes, headers=()) -> None:
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True


def _image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.fault_rate, server.delay_s = float(sys.argv[1]), float(sys.argv[2])
    server.calls, server.lock = [], threading.Lock()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
