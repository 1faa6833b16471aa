"""One module per subcommand of ``moshi-fl``; loaded only when called."""
