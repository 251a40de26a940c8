"""What can be found out with fdflow: python -m studies.toy, .compare, .bench; baselines for --estimator."""
