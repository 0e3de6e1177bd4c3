"""`python -m longrl`: nothing is defined here, since jsonargparse would see a second copy of every class."""

from longrl.commands.main import main

if __name__ == "__main__":
    main()
