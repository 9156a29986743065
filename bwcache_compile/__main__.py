"""The command line as a module: `python -m bwcache_compile`."""

from bwcache_compile.cli import main

if __name__ == "__main__":
    main()
