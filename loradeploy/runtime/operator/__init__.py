"""The kernels of the domain loradeploy for the CPU: build their library, and use it."""
