"""Models whose circuit is known by construction, and how well discovery methods find it."""

from subcircuit.analysis.truth.build import Truth as Truth
from subcircuit.analysis.truth.known import FAMILIES as FAMILIES
from subcircuit.analysis.truth.known import truth as truth
from subcircuit.analysis.truth.known import truth_names as truth_names
