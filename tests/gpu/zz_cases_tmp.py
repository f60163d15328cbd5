import sys; sys.path.insert(0,'/tmp')
from gpu import memory_cases as mc
from dbg_mod import Dbg
LAST=[]
class D(Dbg):
  def __init__(s):
    super().__init__(); LAST.append(s)
mc.CardMemory=D
from gpu.memory_cases import *
old=mc.step
def wrap(f):
  def g():
    r=f(); r['at']=LAST[-1].report(); return r
  return g
NAMES=['Qwen3']
A=CASES|SLOW_CASES
CASES={n:wrap(f) for n,f in A.items() if any(x in n for x in NAMES)}
