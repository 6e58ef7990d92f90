from .attention_features import FEATURES as FEATURES
from .attention_features import SHARES as SHARES
from .attention_features import features as features
from .predictor import OUTCOMES as OUTCOMES
from .predictor import Predictor as Predictor
from .predictor import load_predictor as load_predictor
