import torch,time,sys,statistics,contextlib
sys.path.insert(0,'bench')
import gpu,restow,tempfile
from pathlib import Path
f=Path(tempfile.mkdtemp()); gpu.make(f,8); st=gpu.grouped(8); o=restow.open(f)
from restow.torch import device as dv
from restow.torch.load import *
for i in range(2): restow.load(o,st,threads=8)
gpu.check(st,8)
s=slots_of(st); w=wish_of(s,None,None,(),None,None,False)
p=make_plan(o,[x.target for x in s.slots.values()],w)
def med(n,f=dv._pump):
    out=[]
    for i in range(5):
        with contextlib.ExitStack() as es:
            t=time.time(); f(p,st,dv._Files(es,o.path,{}),n,None); out.append(p.bytes/(time.time()-t)/1e9)
    return statistics.median(out)
for sw in (0.005,0.0002):
  sys.setswitchinterval(sw)
  for slots,size in ((4,64),(8,32),(6,42)):
    dv.SLOTS=slots; dv.SLOT=size<<20
    print("switch",sw,slots,size,{n:round(med(n),1) for n in (6,8,10,12,16)})
sys.setswitchinterval(0.005); dv.SLOTS=4; dv.SLOT=64<<20
mv=dv._move
dv._move=lambda *a: None
print("no moves",{n:round(med(n),1) for n in (8,12,16)})
dv._move=mv
fl=dv._fill
dv._fill=lambda files,ps,slot: sum(x.length for x in ps)
print("no reads",{n:round(med(n),1) for n in (8,)})
dv._fill=fl
L=list(dv.loads(p,st))
dv.loads=lambda *a: iter(L)
print("loads ready",{n:round(med(n),1) for n in (8,12,16)})
for n in (4,6,8,10,12,16): print("raw cache to pinned",n,round(gpu.cache_to_pinned(f,n),1))
