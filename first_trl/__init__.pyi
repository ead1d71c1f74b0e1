from .cache.folder import load_teacher_cache as load_teacher_cache
from .cache.folder import store_recalibration as store_recalibration
from .cache.verify import verify_teacher_cache as verify_teacher_cache
from .calibration import calibration_report as calibration_report
from .calibration import expected_calibration_error as expected_calibration_error
from .calibration import reliability_diagram as reliability_diagram
from .evaluation.multiple_choice import evaluate_multiple_choice as evaluate_multiple_choice
from .evaluation.posthoc import fit_posthoc_temperature as fit_posthoc_temperature
from .evaluation.token_level import evaluate_token_level as evaluate_token_level
from .experiments.recipe import load_recipe as load_recipe
from .experiments.stages.run import run_recipe as run_recipe
from .inference import answer_pipeline as answer_pipeline
from .plugins import load_plugins as load_plugins
from .plugins import register_backend as register_backend
from .plugins import register_estimator as register_estimator
from .plugins import register_metric as register_metric
from .plugins import register_recalibration as register_recalibration
from .plugins import register_task as register_task
from .recalibration import Recalibration as Recalibration
from .recalibration import fit_recalibration as fit_recalibration
from .tasks.base import get_task as get_task
from .tasks.base import list_tasks as list_tasks
from .teacher.capture import add_teacher_topk as add_teacher_topk
from .training.config import FirstDistillConfig as FirstDistillConfig
from .training.token_dropout import TokenDropoutSFTTrainer as TokenDropoutSFTTrainer
from .training.trainer import FirstDistillTrainer as FirstDistillTrainer

__version__: str
