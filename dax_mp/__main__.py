"""`python -m dax_mp` is `dax-mp`, and the command begins here.

Ctrl-C ends it with 130 also while its modules are imported, when there is nothing to undo yet.
"""

from dax_mp.clients.interrupts import end_on_interrupt, raise_on_interrupt


def main() -> None:
    """Run the command line, and end the process."""
    end_on_interrupt()
    from dax_mp.clients import cli

    raise_on_interrupt()
    cli.main()


if __name__ == "__main__":
    main()
