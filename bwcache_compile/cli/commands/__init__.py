"""What each command does, a file each; `bwcache_compile.cli.app` says how they are called."""
