"""``python -m me_stats``."""

from me_stats.cli import main

if __name__ == "__main__":
    main()
