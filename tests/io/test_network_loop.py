"""The network's thread."""

import resource

from longrl.io.network_loop import NetworkLoop


def test_as_many_connections_are_allowed_as_the_system_lets():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        NetworkLoop()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 65536) if hard > 0 else 65536, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
