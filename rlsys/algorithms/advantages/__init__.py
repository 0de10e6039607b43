"""Advantage estimators: one per file, found by name."""

from rlsys.algorithms.advantages.bnpo import bnpo_advantages
from rlsys.algorithms.advantages.contract import (
    AdvantageEstimator,
    AdvantageInputs,
    AdvantageOutput,
    EstimatorSpec,
    Need,
    TokenAuxiliary,
    available_advantage_estimators,
    carries_kl,
    check_advantage_estimator,
    compares_group,
    estimator_needs,
    estimator_spec,
    get_advantage_estimator,
    is_importance_corrected,
    is_unbiased,
    reads_values,
    register_advantage_estimator,
    run_estimator,
    trains_auxiliary,
)
from rlsys.algorithms.advantages.gae import gae_advantages
from rlsys.algorithms.advantages.gdpo import gdpo_advantages
from rlsys.algorithms.advantages.gpg import gpg_advantages
from rlsys.algorithms.advantages.grpo import grpo_advantages
from rlsys.algorithms.advantages.grpo_passk import grpo_passk_advantages
from rlsys.algorithms.advantages.grpo_process import grpo_process_advantages
from rlsys.algorithms.advantages.hierarchical.estimator import hierarchical_advantages
from rlsys.algorithms.advantages.maxrl import maxrl_advantages
from rlsys.algorithms.advantages.opo import opo_advantages
from rlsys.algorithms.advantages.optimal_baseline import optimal_baseline_advantages
from rlsys.algorithms.advantages.optimal_token_baseline import optimal_token_baseline_advantages
from rlsys.algorithms.advantages.rae import rae_advantages
from rlsys.algorithms.advantages.reinforce import reinforce_advantages
from rlsys.algorithms.advantages.reinforce_baseline import reinforce_baseline_advantages
from rlsys.algorithms.advantages.reinforce_plus_plus import reinforce_plus_plus_advantages
from rlsys.algorithms.advantages.remax import remax_advantages
from rlsys.algorithms.advantages.rloo import rloo_advantages
from rlsys.algorithms.advantages.token_kl_grpo import token_kl_grpo_advantages

__all__ = [
    "AdvantageEstimator",
    "AdvantageInputs",
    "AdvantageOutput",
    "EstimatorSpec",
    "Need",
    "TokenAuxiliary",
    "available_advantage_estimators",
    "bnpo_advantages",
    "carries_kl",
    "check_advantage_estimator",
    "compares_group",
    "estimator_needs",
    "estimator_spec",
    "gae_advantages",
    "gdpo_advantages",
    "get_advantage_estimator",
    "gpg_advantages",
    "grpo_advantages",
    "grpo_passk_advantages",
    "grpo_process_advantages",
    "hierarchical_advantages",
    "is_importance_corrected",
    "is_unbiased",
    "maxrl_advantages",
    "opo_advantages",
    "optimal_baseline_advantages",
    "optimal_token_baseline_advantages",
    "rae_advantages",
    "reads_values",
    "register_advantage_estimator",
    "reinforce_advantages",
    "reinforce_baseline_advantages",
    "reinforce_plus_plus_advantages",
    "remax_advantages",
    "rloo_advantages",
    "run_estimator",
    "token_kl_grpo_advantages",
    "trains_auxiliary",
]
