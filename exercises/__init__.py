"""Ten exercises, each with a check that says what is wrong. docs/teaching.md has lesson plans."""
