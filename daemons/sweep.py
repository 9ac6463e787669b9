"""`python -m dax_mp.daemons.sweep DIR`: remove what a dead coordinator left at an endpoint.

The next coordinator there does it by itself; this is for a launcher whose own coordinator has died and will not come
back. Exit code 1, and a line on stderr, where a coordinator serves there or where it is not a directory of ours.
"""

import sys

from dax_mp.daemons.runtime_directory import RuntimeDirectory


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m dax_mp.daemons.sweep DIR", file=sys.stderr)
        return 2
    try:
        RuntimeDirectory.claim(sys.argv[1], create=False).remove()
    except FileNotFoundError:
        pass  # no directory, or nothing of a coordinator's in it
    except OSError as error:
        print(f"dax-mp sweep: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
