from .scenes import Scene as Scene
from .scenes import SceneEntity as SceneEntity
from .scenes import Subject as Subject
from .scenes import World as World
from .scenes import compose as compose
from .scenes import sample as sample
