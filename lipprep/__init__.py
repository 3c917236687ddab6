"""lipprep turns videos of people saying words into training-ready shards, and trains lip readers from them."""

__version__ = "0.1.0"
