"""Why an attention port is off: the known faults, tried out with the reference until one explains what was observed."""

from mhabridge.diff.diagnosis.findings import Diagnosis as Diagnosis
from mhabridge.diff.diagnosis.findings import Fault as Fault
