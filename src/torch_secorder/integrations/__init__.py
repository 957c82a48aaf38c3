"""Extensions for other packages: callbacks for trainers, and ranks for adapters. No other part imports these files."""
