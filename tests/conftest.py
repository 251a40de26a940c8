"""Read by pytest before any test: no test may try the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
