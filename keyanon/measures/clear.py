import torch, numpy as np
from torch.nn.functional import interpolate, avg_pool2d
def similarities(a,b,box,inner=0.0):
    h,w=a.shape[-2:]
    l,t=np.clip(np.round(box[:2]).astype(int),0,[w-1,h-1]); r,u=np.clip(np.round(box[2:]).astype(int),[l+1,t+1],[w,h])
    def g(x): return x.mean(0)[None,None,t:u,l:r]
    x,y=g(a),g(b)
    S=48
    x,y=(interpolate(v,(S,S),mode='bilinear',antialias=True,align_corners=False) for v in (x,y))
    def corr(p,q):
        p=p-p.mean(); q=q-q.mean(); return float((p*q).sum()/(p.norm()*q.norm()+1e-8))
    def hp(v,k): return v-torch.nn.functional.avg_pool2d(torch.nn.functional.pad(v,(k//2,)*4,mode='replicate'),k,1)
    # local ssim mean, corr of highpass 5, corr of highpass 9, min over 3x3 parts of local corr
    from torchmetrics.functional.image import structural_similarity_index_measure as ss
    s=float(ss((x+1)/2,(y+1)/2,data_range=1.0))
    hx,hy=hp(x,5),hp(y,5)
    c5=corr(hx,hy); c9=corr(hp(x,9),hp(y,9))
    local=[corr(hx[...,i:i+16,j:j+16],hy[...,i:i+16,j:j+16]) for i in (0,16,32) for j in (0,16,32)]
    return s,c5,c9,float(np.mean(sorted(local)[:3]))
