"""The check of the CUDA path on one GPU: `python -m benchmarks.gpu_check`, or `make check-gpu`.

__main__     the command line
catalogue    the checks: what each proves, needs and may take
runner       one child process for each check; a crash in one does not end the others
child        what runs in it
results      the records of a check: figures, faults, status
report       the Markdown page and the JSON file
policy, examples, attention, update, weight_sync, grpo, recipe, throughput, machine    the checks

The command line needs the standard library alone, the checks torch and transformers; what else one
needs stands in the catalogue. So it starts on a machine that has nothing but these.
"""
