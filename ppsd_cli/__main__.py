"""``python -m ppsd_cli``, as torchrun starts it."""

from ppsd_cli.cli import main

if __name__ == "__main__":
    main()
