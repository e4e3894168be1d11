"""FALCON: reinforcement learning of code models with a long-term and a short-term memory (arXiv 2410.21349).

The package reads like the paper's overview figure; a module imports only modules above it in this list:

    errors, files             the one exception; whole files or nothing
    records, typed, config    what travels and what can be set
    tasks, prompts            task + recalled episodes -> prompt; program out of a completion
    sandbox, judge            unit tests and AI feedback
    feedback, rewards, watch  report + judge scores -> feedback -> token-level advantages; alarms (pure functions)
    memory                    long-term (SQLite + FAISS) and short-term (ring buffers)
    policy                    model, LoRA, generation engine, fast weights
    rollout                   the conductor: recall -> prompt -> generate -> execute -> judge -> reward -> remember
    training                  losses, the MRLF loop, the arms of the comparison, SFT
    evaluation, reporting     pass@k with intervals; run folders, tables, figures
    doctor                    what this machine has and lacks
    notebook, graph, workflow one notebook in a child process; which are up to date; running them in order
    commands, cli             the commands and their options

Importing `falconlib` itself is light: torch, trl and faiss are imported where they are used.
"""

__version__ = "0.1.0"
