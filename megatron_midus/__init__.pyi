# What the names of this package are, for editors and type checkers: at run time they are imported when first used.
from megatron_midus.verbs.analyze import analyze as analyze
from megatron_midus.verbs.average import average as average
from megatron_midus.verbs.background import background as background
from megatron_midus.verbs.chat import chat as chat
from megatron_midus.verbs.compare import compare as compare
from megatron_midus.verbs.convert import convert as convert
from megatron_midus.verbs.doctor import doctor as doctor
from megatron_midus.verbs.evaluate import evaluate as evaluate
from megatron_midus.verbs.generate import generate as generate
from megatron_midus.verbs.merge import merge as merge
from megatron_midus.verbs.plan import plan as plan
from megatron_midus.verbs.preprocess import preprocess as preprocess
from megatron_midus.verbs.pretrain import pretrain as pretrain
from megatron_midus.verbs.push import push as push
from megatron_midus.verbs.recipe import recipe as recipe
from megatron_midus.verbs.serve import serve as serve
from megatron_midus.verbs.upscale import upscale as upscale

__version__: str
