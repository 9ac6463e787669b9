"""`python -m dax_mp` is `dax-mp`."""

from dax_mp.clients.cli import main

if __name__ == "__main__":
    main()
