"""Figures side by side with HF PEFT, each pair measured in one run. ``python -m benchmarks`` runs them all."""
