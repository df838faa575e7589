"""Balancers: optax transforms that combine the gradients of several tasks."""

from mtjax.balancing.aligned_mtl import aligned_mtl
from mtjax.balancing.auto_lambda import AutoLambdaState, auto_lambda
from mtjax.balancing.balancer import Step, balancer, gramian_balancer
from mtjax.balancing.cagrad import cagrad, conflict_averse_weights
from mtjax.balancing.config import config
from mtjax.balancing.conic_grad import conic_grad
from mtjax.balancing.constant import constant
from mtjax.balancing.cosmos import cosmos
from mtjax.balancing.cr_mogm import CRMOGMState, cr_mogm
from mtjax.balancing.db_mtl import DBMTLState, db_mtl
from mtjax.balancing.dualproj import dualproj, project_on_dual_cone
from mtjax.balancing.dwa import DWAState, dwa
from mtjax.balancing.equal import equal
from mtjax.balancing.excess_mtl import ExcessMTLState, excess_mtl
from mtjax.balancing.fair_grad import FairGradState, fair_grad, fair_weights
from mtjax.balancing.famo import FAMOState, famo
from mtjax.balancing.forum import FORUMState, forum
from mtjax.balancing.gls import gls
from mtjax.balancing.go4align import GO4AlignState, go4align
from mtjax.balancing.grad_norm_weights import grad_norm_weights
from mtjax.balancing.graddrop import GradDropState, graddrop
from mtjax.balancing.gradnorm import GradNormState, gradnorm
from mtjax.balancing.gradvac import GradVacState, gradvac
from mtjax.balancing.imgrad import imbalance_sensitive_weights, imgrad
from mtjax.balancing.imtl import imtl
from mtjax.balancing.imtl_g import imtl_g
from mtjax.balancing.imtl_l import IMTLLState, imtl_l
from mtjax.balancing.inverse_shares import InverseSharesState
from mtjax.balancing.krum import krum
from mtjax.balancing.metabalance import MetaBalanceState, metabalance
from mtjax.balancing.mgda import mgda, min_norm_weights
from mtjax.balancing.moco import MoCoState, moco
from mtjax.balancing.modo import MoDoState, modo
from mtjax.balancing.moml import MOMLState, moml
from mtjax.balancing.mtadam import MTAdamState, mtadam
from mtjax.balancing.nash_mtl import NashMTLState, nash_mtl
from mtjax.balancing.ntk_weights import ntk_traces, ntk_weights
from mtjax.balancing.pbi import pbi
from mtjax.balancing.pcd import PCDState, pcd, prioritised_weights
from mtjax.balancing.pcgrad import PCGradState, pcgrad
from mtjax.balancing.rlw import RLWState, rlw
from mtjax.balancing.rotations import init_rotations, rotated
from mtjax.balancing.rotograd import RotoGradState, rotograd
from mtjax.balancing.scalarisation import loss_weighting, scalarisation
from mtjax.balancing.scale_invariant import scale_invariant
from mtjax.balancing.sdmgrad import SDMGradState, sdmgrad
from mtjax.balancing.solvers import Info, bounded_qp, fair_equilibrium, in_units
from mtjax.balancing.stch import STCHState, stch
from mtjax.balancing.trimmed_mean import trimmed_mean
from mtjax.balancing.upgrad import projection_weights, upgrad
from mtjax.balancing.uw import UWState, uw
from mtjax.balancing.uw_so import uw_so

__all__ = [
    "AutoLambdaState",
    "CRMOGMState",
    "DBMTLState",
    "DWAState",
    "ExcessMTLState",
    "FAMOState",
    "FORUMState",
    "FairGradState",
    "GO4AlignState",
    "GradDropState",
    "GradNormState",
    "GradVacState",
    "IMTLLState",
    "Info",
    "InverseSharesState",
    "MOMLState",
    "MTAdamState",
    "MetaBalanceState",
    "MoCoState",
    "MoDoState",
    "NashMTLState",
    "PCDState",
    "PCGradState",
    "RLWState",
    "RotoGradState",
    "SDMGradState",
    "STCHState",
    "Step",
    "UWState",
    "aligned_mtl",
    "auto_lambda",
    "balancer",
    "bounded_qp",
    "cagrad",
    "config",
    "conflict_averse_weights",
    "conic_grad",
    "constant",
    "cosmos",
    "cr_mogm",
    "db_mtl",
    "dualproj",
    "dwa",
    "equal",
    "excess_mtl",
    "fair_equilibrium",
    "fair_grad",
    "fair_weights",
    "famo",
    "forum",
    "gls",
    "go4align",
    "grad_norm_weights",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian_balancer",
    "imbalance_sensitive_weights",
    "imgrad",
    "imtl",
    "imtl_g",
    "imtl_l",
    "in_units",
    "init_rotations",
    "krum",
    "loss_weighting",
    "metabalance",
    "mgda",
    "min_norm_weights",
    "moco",
    "modo",
    "moml",
    "mtadam",
    "nash_mtl",
    "ntk_traces",
    "ntk_weights",
    "pbi",
    "pcd",
    "pcgrad",
    "prioritised_weights",
    "project_on_dual_cone",
    "projection_weights",
    "rlw",
    "rotated",
    "rotograd",
    "scalarisation",
    "scale_invariant",
    "sdmgrad",
    "stch",
    "trimmed_mean",
    "upgrad",
    "uw",
    "uw_so",
]
