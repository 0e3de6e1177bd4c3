"""Environments of the forms that TRL and OpenEnv document."""

import json
import pickle
from dataclasses import dataclass

from longrl.environments.adapters import OpenEnvEnvironment, TRLEnvironment
from longrl.types import Row

ROW = Row("r", "Guess.", "7", metadata={"limit": 9})


class Guessing:
    """As of TRL: no arguments, `reset(**columns)`, public methods are tools."""

    def __init__(self):
        self.reward = 0.0

    def reset(self, **columns):
        self.number, self.limit = int(columns["answer"]), columns["limit"]
        return f"It is below {self.limit}."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.

        Returns:
            Whether it is right.
        """
        if number > self.limit:
            raise ValueError("Game over.")
        return "right" if number == self.number else "wrong"

    def _helper(self):
        return None


@dataclass
class Action:
    message: str


@dataclass
class Seen:
    echo: str
    reward: float = 0.5
    done: bool = False


class Echo:
    """As of OpenEnv: `reset`, and `step(action)` with an observation that has reward and done."""

    def reset(self, seed=None, episode_id=None):
        return Seen(f"episode {episode_id}")

    def step(self, action):
        return Seen(action.message.upper(), done=action.message == "bye")


def guess(environment, **arguments):
    text = "<tool_call>" + json.dumps({"name": "guess", "arguments": arguments}) + "</tool_call>"
    return [response.content[0] for response in environment.step(text).responses]


def test_public_methods_of_a_class_for_trl_are_tools():
    environment = TRLEnvironment(f"{__name__}.Guessing")
    (schema,) = environment.tools
    assert schema["function"]["name"] == "guess"
    assert "return" not in schema["function"]
    environment.reset(ROW)
    environment = pickle.loads(pickle.dumps(environment))
    assert guess(environment, number=3) == ["It is below 9.", "wrong"]
    assert guess(environment, number=7.0) == ["right"]
    assert guess(environment, number=10) == ["Error: guess failed (ValueError: Game over.); try other arguments"]
    assert guess(environment, number="x")[0].startswith("Error: `number` of guess(number) must be a whole number")
    assert environment.step("It is 7.") is None


def test_an_environment_of_openenv_is_told_the_turn_and_ends_behind_done():
    environment = OpenEnvEnvironment(f"{__name__}.Echo", f"{__name__}.Action", observation_field="echo")
    assert environment.tools == ()
    environment.reset(ROW)
    environment = pickle.loads(pickle.dumps(environment))
    assert environment.step("<think>hm</think>\nhello") == "episode r\nHELLO"
    assert environment.step("bye") == "BYE"
    assert environment.step("again") is None


def test_an_observation_of_several_fields_is_shown_as_json():
    environment = OpenEnvEnvironment(Echo, Action)
    environment.reset(ROW)
    assert environment.step("a") == '{"echo": "episode r"}\n{"echo": "A"}'
