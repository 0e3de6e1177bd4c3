"""A runner of hostile environments that all tests share: to start its processes takes seconds."""

import pytest

from longrl.environments.runner import EnvironmentRunner
from longrl.environments.settings import EnvironmentSettings
from tests.datamodules.media.test_video import write
from tests.environments.asking import MAKE, SECONDS, wait_for_end
from tests.tiny import vl_family


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("clips") / "v.mp4", 40))


@pytest.fixture(scope="session")
def model():
    return vl_family().build()


@pytest.fixture(scope="session")
def family():
    return vl_family()


@pytest.fixture(scope="session")
def runner(family):
    settings = EnvironmentSettings(MAKE, {"max_frames": 8}, max_observed_tokens=600, seconds_per_call=SECONDS)
    runner = EnvironmentRunner(settings, family)
    yield runner
    pids = [runner._processes._server.pid, *(lane._process.pid for lane in runner._lanes if lane._process)]
    runner.close()
    wait_for_end(pids)
