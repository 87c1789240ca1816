"""MLflow, the place where people read and choose; storage, not MLflow, says what is finished.

Nothing else imports mlflow. Its client reads these settings from the environment, so they stand here, before
its first import.
"""

import os

# The sender retries by itself, and looks before it creates: the client's own retries (seven, 248 s on a refused
# port) would block, and make a run twice when only the answer was lost.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; the default is 120
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # where there is no git, nothing is said of it
