"""The command `tandem`: one module a command; whatever is heavy is imported when its command runs."""
