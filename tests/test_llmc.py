"""The initial loss equals that of llm.c, an independent implementation in C."""

import base64
import zlib

import numpy as np
import torch
from torch.nn import functional as F

from train_gpt2 import GPT, GPTConfig

# Loss of llm.c's train_gpt2.c (commit f1e2ace6), started from the weights that
# torch.manual_seed(1337) gives to GPT(GPTConfig(vocab_size=50304)), on 20 windows of 64 tokens.
# Its softmax covers the first 50,257 logits; the rest of the vocabulary is padding.
LLMC_LOSS = 10.906511
# The first 1,281 GPT-2 token ids of Tiny Shakespeare: little-endian uint16, zlib, base 85
TOKENS = (
    "c-m!EeNa@_6+h?P_ufAC?gN44W7l;d%V3bG5vU(nfe5k+LA30eW>a->z=>u^G_`T0IBHr*nqjmtjv*2?8PkMTNShebXvQ>"
    "}wlA?`QV_AzU{dYSl5}b^NmENlYI^RXEen6_?3;Vf*Y9_J=iKUyoNs%;hQDMtBDh!4Ia9)b>lz++T6}85i!OD$%l$q|xOG"
    ";2)8~Gp4L`#6!uw1g&PjQYeAul0l>FoT)~8as1?`3Le$^QgA~-@zai!x?yr#dgsTAK$+Lr7?1NYPTyqmNUy2zOuQT@k9*`"
    "7{xQST-R0c^zQv@Se2s|AnH55#X`b@nD+M8r=QjjyLo>U5`7h8NKb)ATSF;bp@Ef7B)aAZGX4onz5=xN;2%o#LG-@mV)%Z"
    "TM29OnhgG1Ot!h`!#8F3T0!N!PK*&Cv}%7!vd<^NaTSA8bTYss@~=&8f0`;zdFol21FQh$c85zm!^CWLw8C0Udj*#?<Jbm"
    "QpmO0U?vaYcF~A!xLbQ*u7`6ylONWC9IekW^+h6;{T|cLc<bvWlwt#V_-?q~hX)-g;%f}ndf^D?sDmfx)>0`m@gVcNma3D"
    "8`b&B+%GNe!AZ1CIgBmk<+}MhZng^=5&brwnw2&>Xo#??VthuWSOKy|U!QZ*{RoGu*#c_4EBEs6qc52%HJ35~ArUTvdKC="
    "<RI<8~6_|T;~-EBUa5g+GhO$1vh;0)mf?n@Q+;h^r1WB(szn}wJA{W~hc$DKZ$VRTccuwhZr?o0`T7{m}d=AAL47#0Jb_~"
    "^5s0+r2iX9sFa3MZ&35B7*-1rfGrr4Y({E*mpfO0M`b<}eX`9C@qoz>wJMbitgAe(_2AQT-h2$A+AlKHS3{eFVoURz6|&u"
    "wi6NAAac!@OKejm^t9_LKeriA&IkSV*LyQA6nsOpHOjprIr~&XM&|=@!j_=H7g4o$bQWaWnnkZ#{n_QcWqQ5_J|Oc;!}+w"
    "&?p|ysJ;+KwGPg-5dTdbTtQW*ANS2y+9JkR&@3T}o~06ec)cVG|FdOG!@qsJ4HJYPcH%O6*N|wi&Mp|L=KLid_(EUpY(%H"
    "X5r1YI)y0!VFn+!kOCUYIl5<M|M$u_1kMSty!G~3^X1MTZ;@$*j@m=7B6bf=>Cv-=q4STiy6A+n39i~ugS{_eq0e!@|=jk"
    "~lX)J%s>D@*iG|Msm4pSW?-#~+UWugQ|$GP)GKSr3vm9BL)0bDR$VH`F6ywwy(C+0*ZD1zK2Mk#jS?H+~mtH-=Bgk9`^D)"
    "{B%6?zZ;>v$_Q;>*Q8JkPmocseCXs6F(AI76FxQm(AFAgb*VGSP-#WE`R{Y<8H(SVMTq9AQrzg7cdlS5tRu)+7XXyCr-cR"
    "0ul7!2}8J%+|EOuU1)Z4@B_gHLV-{6Sk6*t)iuBm$c!QS9D`?%sj|6l)hEGt8~YzVx4<4`_>Ngqr!immQM35m8W;=R9_bM"
    ";A8lw*-C-K)PS3L(&}4Un2qw>D5ld&G+hl?mbaGFj2l>-bx4!YC;w?&!7|3zixoT<XPDozhNrC#U%B=I=d5(=)a>}g*?`I"
    "XW}L%)tggzGUo&Ir)V*O{qN>8UnODWAo2@p_tvV&7a!j@JRgLWn)J{|PS5qa7Y8G>OUYv~eL%mL)E_)tdZ$Heo1tQhR7dj"
    "2^jKsVnn0r!1|A}Z9V=7m*k7BW2#dkGyqg=)4G9&m(#ahPx<MeoSY^$t7V(mFR5-z6!clryC;=s?Bt8*KQ)_b7;HoEyHs*"
    "GP_d7=xNYi%fp?}!~*6fYHe8O>R(c)s#kY^YhZ!9A1c-X&hhFJ6<piu}P3@b?@q*rYKl9ci)G&eZv21-vc#&9ZfCl9k_En"
    "Kv+itq0WPNapZw!oZQ~KTIZ`{TqyU2(O?w#@g#yb*QGN&@qH>dWj}0<>MU@-W@i4ciA)8y0OgFGfi8f*s#-z@Vc9~$j>aE"
    "m{X?GlMUJMcEa>R4}@7GMa*3nz9hr3Hw+okt6CTbb2d;{lA5wB*j8l2`GkUlXD9@SeqEn1<@?f=-E-Q2OLaL~%I}dQ65C|"
    "kg<_`?o~K20gz}rB{FbP^gKXzP74Mst4ezmk$UPZTx#JPG-$f6^HpejUl4^$y84tffmZ6yKTP~qs%5`@bmGyfGuTc#lHXj"
    "M|Ha~5t=}{V)TRNtdVMca39Kbv1S+`<lYi^V0sU`!hh97Y?f6!*k=htjn>WpY?OG(~62Jh2Ap$!kux<LUPa7ozya|tI{wS"
    "7E~f7Mi!S_don{#Dr$KBJG_tj_jY&h?FN1u(m^+f<WdV7ocYv%Qn+?R8nkFL5GwY6rAZuj`OdnEaD?&?54Gy|W<OMEozCc"
    "U>3"
)


def test_initial_loss_equals_llmc():
    ids = np.frombuffer(zlib.decompress(base64.b85decode(TOKENS)), dtype="<u2").astype(np.int64)
    assert len(ids) == 20 * 64 + 1
    x, y = torch.from_numpy(ids[:-1]).view(20, 64), torch.from_numpy(ids[1:]).view(20, 64)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304))
    with torch.no_grad():
        # four windows at a time: 50,304 logits per token take 50 MB
        losses = [F.cross_entropy(model(a)[0][..., :50257].flatten(0, 1), b.flatten())
                  for a, b in zip(x.split(4), y.split(4), strict=True)]
    assert abs(torch.stack(losses).mean().item() - LLMC_LOSS) < 5e-6
