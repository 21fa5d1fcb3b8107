"""Models whose circuit is known by construction, and how well discovery methods find it."""

from subcircuit.analysis.truth.build import Truth as Truth
from subcircuit.analysis.truth.known import FAMILIES as FAMILIES
from subcircuit.analysis.truth.known import truth as truth
from subcircuit.analysis.truth.known import truth_names as truth_names
from subcircuit.analysis.truth.methods import EXACT as EXACT
from subcircuit.analysis.truth.methods import METHODS as METHODS
from subcircuit.analysis.truth.methods import ONE_SIDED as ONE_SIDED
from subcircuit.analysis.truth.methods import TruthRow as TruthRow
from subcircuit.analysis.truth.methods import truth_table as truth_table
from subcircuit.analysis.truth.recovery import Found as Found
from subcircuit.analysis.truth.recovery import Recovery as Recovery
from subcircuit.analysis.truth.recovery import truth_report as truth_report
