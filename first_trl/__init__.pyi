from .cache.folder import load_teacher_cache as load_teacher_cache
from .cache.verify import verify_teacher_cache as verify_teacher_cache
from .calibration import calibration_report as calibration_report
from .calibration import expected_calibration_error as expected_calibration_error
from .calibration import reliability_diagram as reliability_diagram
from .evaluation.multiple_choice import evaluate_multiple_choice as evaluate_multiple_choice
from .experiments.recipe import load_recipe as load_recipe
from .experiments.stages.stages import run_recipe as run_recipe
from .inference import answer_pipeline as answer_pipeline
from .recalibration import Recalibration as Recalibration
from .recalibration import fit_recalibration as fit_recalibration
from .teacher.capture import add_teacher_topk as add_teacher_topk
from .training.config import FirstDistillConfig as FirstDistillConfig
from .training.trainer import FirstDistillTrainer as FirstDistillTrainer

__version__: str
