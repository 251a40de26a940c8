"""What can be found out with fdflow: run a study with `python -m studies.NAME`."""
