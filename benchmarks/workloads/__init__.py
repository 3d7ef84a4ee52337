"""The eight workloads: what is read and written, with hooks as everyone writes them first and as an expert does."""

from workloads.s1_sweep import S1
from workloads.s2_heads import S2
from workloads.s3_lens import S3
from workloads.s4_save_all import S4
from workloads.s5_harvest import S5
from workloads.s6_attribution import S6
from workloads.s7_patchscope import S7
from workloads.s8_steering import S8

WORKLOADS = {workload.name: workload for workload in (S1, S2, S3, S4, S5, S6, S7, S8)}

__all__ = ["WORKLOADS"]
