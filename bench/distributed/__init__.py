"""``python -m bench distributed``: steps on factors over several processes, their time and the bytes they send.

gloo, CPU tensors, one thread a process; where there are more processes than cores, times say how they share them.
"""
