"""One module per subcommand of ``moshi-hub``; loaded only when called."""
