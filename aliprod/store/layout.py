"""Names of what lies in a job's folder."""

METRICS = "metrics.jsonl"  # a line an epoch
RESUME = "resume"  # checkpoints of a job on its way
LAST = "last"  # weights of the last epoch, where that is not the best
WEIGHTS = "weights"  # the best; its commit record says that the job is finished
KEPT = "kept"  # rows that the filter of duplicates leaves
