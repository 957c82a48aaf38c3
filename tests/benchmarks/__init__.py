"""What the exact numbers cost, beside what other packages charge: `make bench` and `make bench-growth`.

One measurement alone: ``PYTHONPATH=src:tests python -m benchmarks.speed --workloads mlp cnn --variants monitor functional``.
"""
