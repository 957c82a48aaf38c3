"""The version of this package, which runs from its sources, too, where nothing is installed."""

VERSION = "0.1.0"
