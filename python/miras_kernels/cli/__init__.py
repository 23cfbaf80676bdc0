"""The subcommands of ``python -m miras_kernels``, a module each: ``add_arguments(parser)`` and ``run(args)``, the exit status."""
