"""Balancers: optax transforms that combine the gradients of several tasks."""

from mtjax.balancing.balancer import Step, balancer, gramian_balancer
from mtjax.balancing.cagrad import cagrad
from mtjax.balancing.constant import constant
from mtjax.balancing.dwa import DWAState, dwa
from mtjax.balancing.equal import equal
from mtjax.balancing.famo import FAMOState, famo
from mtjax.balancing.graddrop import GradDropState, graddrop
from mtjax.balancing.mgda import mgda
from mtjax.balancing.nash_mtl import NashMTLState, nash_mtl
from mtjax.balancing.pcgrad import PCGradState, pcgrad
from mtjax.balancing.upgrad import upgrad
from mtjax.balancing.uw import UWState, uw

__all__ = [
    "DWAState",
    "FAMOState",
    "GradDropState",
    "NashMTLState",
    "PCGradState",
    "Step",
    "UWState",
    "balancer",
    "cagrad",
    "constant",
    "dwa",
    "equal",
    "famo",
    "graddrop",
    "gramian_balancer",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "upgrad",
    "uw",
]
