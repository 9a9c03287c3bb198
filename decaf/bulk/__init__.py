"""Many clips and queries: jobs that can be stopped and taken up again, in this process or on a cluster.

It knows neither manifests nor datasets: `decaf.command` and `decaf.evaluation` make jobs of those.
"""

from .jobs import Job, Outcome
from .run import run_jobs
from .run_folder import RunFolder

__all__ = ["Job", "Outcome", "RunFolder", "run_jobs"]
