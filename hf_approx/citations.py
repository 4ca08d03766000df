"""The papers behind the methods, as BibTeX, by the name a method or optimizer reports."""

CITATIONS = {
    "avagrad": """@inproceedings{savarese2021domain,
  title={Domain-independent Dominance of Adaptive Methods},
  author={Savarese, Pedro and McAllester, David and Babu, Sudarshan and Maire, Michael},
  booktitle={CVPR}, year={2021}}""",
    "sparsification": """@inproceedings{savarese2020winning,
  title={Winning the Lottery with Continuous Sparsification},
  author={Savarese, Pedro and Silva, Hugo and Maire, Michael}, booktitle={NeurIPS}, year={2020}}""",
    "smol": """@inproceedings{savarese2022bits,
  title={Not All Bits have Equal Value: Heterogeneous Precisions via Trainable Noise},
  author={Savarese, Pedro and Yuan, Xin and Li, Yanjing and Maire, Michael}, booktitle={NeurIPS}, year={2022}}""",
    "sharing": """@inproceedings{savarese2019learning,
  title={Learning Implicitly Recurrent CNNs Through Parameter Sharing},
  author={Savarese, Pedro and Maire, Michael}, booktitle={ICLR}, year={2019}}""",
    "magnitude": """@article{zhu2017prune,
  title={To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression},
  author={Zhu, Michael and Gupta, Suyog}, journal={arXiv:1710.01878}, year={2017}}""",
    "movement": """@inproceedings{sanh2020movement,
  title={Movement Pruning: Adaptive Sparsity by Fine-Tuning},
  author={Sanh, Victor and Wolf, Thomas and Rush, Alexander}, booktitle={NeurIPS}, year={2020}}""",
}
