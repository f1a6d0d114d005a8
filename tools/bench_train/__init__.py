"""Training benchmarks: PEFT with transformers' Trainer and loradeploy, in turns."""
