"""loradeploy against the engines that users would take on a CPU (see __main__)."""
