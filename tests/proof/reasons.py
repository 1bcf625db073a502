"""Why a mutant that no case notices changes nothing that may be seen."""

SKIPPED = r"^@%p\d+ bra \S+ -> @%p\d+ membar"  # a branch that is no longer taken

UNREACHED = "no launch comes by: a test is made twice, and the first has dealt with this outcome; or the host never asks for it"

# Backend or "", pattern of the line of csrc/ that the instruction is from, pattern of "before -> after where predicates are
# made", reason. The first that fits is taken.
REASONS = [
    ("", "", r"^ret -> ", "the kernel ends there in any case"),
    ("", "", r"%nctaid\.y", "a launch has a third dimension beyond 65,535 blocks of samples only"),
    ("", "", r"^(mov\.u16 \S+, 1 -> mov\.u16 \S+, 2|selp\.u(16|32) \S+, 1, 0, \S+ -> selp\.u(16|32) \S+, 2, 0)",
     "a condition: every number but 0 holds"),
    # Triton
    ("triton", "", r"^mov\.u(16|32|64) \S+, 0x0 -> ",
     "a load writes over it; where its guard is false, nothing uses the value"),
    ("triton", "", r"^or\.b32 |^setp\.lt\.s32 .* -> setp\.le\.s32 ",
     "this kernel is launched on samples of whole rows only: the lanes of a row end together"),
    ("triton", "", r"^min\.s64 .*, 1024 -> ", "the last element of a tile is 1023: both lie behind it"),
    ("triton", "", r"atom\.global\.gpu\.relaxed\.or|^setp\.eq\.b32 %p\d+, %r\d+, 0 -> setp\.(ne|eq)",
     "which threads set a flag of the status, and all set the same; or whether noise without weight is drawn, which "
     "is added to nothing"),
    ("triton", "", r"^and\.b32 \S+, \S+, 2147483647 -> or", "whether noise without weight is drawn: it is added to nothing"),
    ("triton", "", r"^@!?%p\d+ bra ", "whether noise without weight is drawn: it is added to nothing"),
    # Where a thread stands
    ("cuda", r"\(a \| b\) >> 32\) == 0|^FD_HD int64_t at\(", r"-4294967296|^setp\.eq\.s64 .*, 1$|" + SKIPPED,
     "whether numbers are divided in 32 or in 64 bits: the quotient is the same"),
    ("cuda", r"\(a \| b\) >> 32\) == 0", r"^bra\.uni ", "the same division of 32 bits follows"),
    ("cuda", r"Place p = place<|^if \(inner && p\.hi > 0\)", r"^mov\.u64 ",
     "the pixel and the group of a thread in a launch without channels-last views"),
    ("cuda", r"p\.e0 >= a\.numel\) return", r"^setp\.ge\.s64 .* -> setp\.gt\.s64 ",
     "a thread whose first element is the one behind the last owns none; where all threads are whole, no such thread"
     " is"),
    ("cuda", r"p\.hi = static_cast<int>\(numel", r"^min\.s64 .*, 4 -> .*, 5",
     "a thread of four elements that goes through them one by one"),
    ("cuda", r"^for \(int64_t token", SKIPPED, "a thread without an element has ended before"),
    ("cuda", r"^p\.hi = end < count", r"^setp\.lt\.s64 .* -> setp\.le\.s64 ",
     "a token that ends with the thread: both numbers are the same"),
    # The bank
    ("cuda", r"term < a\.layout\.bank", SKIPPED + r"\S* where setp\.lt\.s32 \S+, \S+, 1$", "this kernel has a bank"),
    ("cuda", r"index < 0 \|\| index >= a\.bank_size", r"^setp\.lt\.s64 (\S+, \S+), 0 -> setp\.lt\.s64 \1, 1$",
     "an index that is not in the bank is not 0"),
    # The status
    ("cuda", r"^if \(leads\(", SKIPPED, "all threads of the warp report what one would: the same"),
    # Masks
    ("cuda", r"(draws \|=|!has\(targets, t\)\) continue; <)", r"bra|^selp\.u(16|32) \S+, 1, 0, \S+ -> selp\.u(16|32) \S+, 1, 1|^mov\.",
     "noise is drawn that no target takes"),
    ("cuda", r"^if \(draws && a\.keys", r"^setp\.eq\.s64 (\S+, \S+), 0 -> setp\.eq\.s64 \1, 1$|^or\.pred .* -> and\.pred",
     "where there are no keys there is no noise term; and noise is drawn that no target takes"),
    ("cuda", r"if \(has\(mask\.targets, 0\)\) masked", SKIPPED + r"|^mov\.u32 \S+, -1 -> ", "an input is called the masked one where inputs are no target"),
    # What is loaded and stored
    ("cuda", r"^FD_HD inline bool has\(.*launch\.aligned|^const bool vector = |^if \(vector\) \{|^if \(has\(launch\.aligned",
     "",
     "a vector or its elements one by one: the same bytes"),
    ("cuda", "", r"^ld\.param\.u(8|16|32) \S+, \[\S+\+9[56]\d\] |^setp\.(eq|ne)\.s32 (\S+, \S+), 4 -> setp\.\2\.s32 \3, 5$",
     "a vector or its elements one by one: the same bytes"),
    ("cuda", r"^write8\(", r"^bra\.uni ", "what a vector has written is written once more, element by element"),
    ("cuda", r"^const Words[24] v", r"^bra\.uni ", "what a vector has read is read once more, element by element"),
    ("cuda", r"bool within\(|raw\.w\[|^if \(a\.row\)",
     r"^setp\.gt\.s32 (\S+, \S+), 3 -> setp\.gt\.s32 \1, 4$|^setp\.lt\.s32 (\S+, \S+), 4 -> setp\.lt\.s32 \2, 5$",
     "no token begins behind the last element of a thread"),
    ("cuda", r"pixel.*raw\.w\[|raw\.w\[.*pixel",
     r"^(or\.pred .* -> and\.pred|" + SKIPPED[1:] + r").* where setp\.lt\.s32 \S+, \S+, [23]\b",
     "of a channels-last sample, an element at another place is read for one behind the last, and not used"),
    ("cuda", r"^const Words[24] v|^if \(a\.row\)|term < a\.layout\.bank", r"^setp\.eq\.s32 \S+, \S+, 0 -> setp\.(ne|eq)",
     "a vector or its elements one by one: the same bytes"),
    ("cuda", r"has\(mask\.targets, 0\)|^if \(flags & kClip\)", r"^xor\.pred .* -> or\.pred", "the other operand is false"),
    ("cuda", r"^if \(!has\(targets, target\)\) return; < if \(kFull && first", SKIPPED,
     "an input is the masked one only where inputs are a target"),
    ("cuda", r"< add\(k, mixes\[2 \* target\], known|sum\[l\] = Lane::fma", r"^fma\.rn\.f32 .* -> mul\.rn\.f32",
     "the first term of a sum, which starts at -0.0: a product"),
    ("cuda", r"raw\.w\[|^const Words[24] v|bool within\(", r"^mov\.[ub]32 ", "the value of a lane that is not there"),
    # Terms
    ("cuda", r"needed\[j\]|^if \(k >= layout\.inputs\)|^weight\[j\]\[i\]|c == 0\.0f \? 0\.0f", r"^mov\.u16 ",
     "an input without weight is called needed: nothing of it is added"),
    ("cuda", r"^weight\[j\]\[i\]", SKIPPED + r"\S* where setp\.lt\.s32 \S+, \S+, 0$",
     "there are never fewer outputs than none"),
    ("cuda", r"^if \(!needed\[j\]\) continue", SKIPPED, "an input without weight is called needed: nothing of it is added"),
    ("cuda", r"^if \(k >= layout\.inputs\)", SKIPPED, "the first input of a group is there while the loop runs"),
    ("cuda", r"^if \(k >= layout\.inputs\)", r"^setp\.ge\.s32 .* -> setp\.gt\.s32 ",
     "the first input of a group is there while the loop runs"),
    ("cuda", r"first < layout\.inputs", r"^setp\.lt\.s32 .* -> setp\.le\.s32 |" + SKIPPED,
     "one more group, of inputs that are not there: none is needed"),
    ("cuda", r"i < layout\.outputs\)|w\[i\] = i < layout|Place p = place<|^c\[i\] = i < count|int y_width\(\)",
     SKIPPED + r"|^mov\.f32 ",
     "an output that is not there is summed up, and not stored"),
    ("cuda", r"c == 0\.0f \? 0\.0f|^weight\[j\]\[i\]|^c\[i\] = ", r"^mov\.f32 \S+, %\S+ -> neg",
     "a weight of -0.0 removes its term as 0.0 does"),
    ("cuda", r"^if \(!any\) continue; < apply_row", SKIPPED, "noise that no output takes is drawn"),
    # NaN
    ("cuda", r"found = found \|\| is_nan\(v\[l\]\)|^if \(nans\)", r"bra|^mov\.(u16|pred)|^selp",
     "NaN are looked for where there is none"),
    ("cuda", r"is_nan_bits\(v\[l\]\) && within|0x7FFFFFFFu\) > 0x7F800000u; \} < found",
     r"^and\.b32 \S+, \S+, 2147483647 -> or|^setp\.gt\.u32 \S+, \S+, 2139095040 -> setp\.gt\.u32 \S+, \S+, 718624085|"
     r"^selp\.u16 (\S+), 1, 0, (\S+) -> selp\.u16 \1, 1, 1",
     "a thread that has all its elements and met a NaN: whichever it was, the answer is known"),
    # Philox
    ("cuda", r"W::xor3|half\)", r"^xor\.b32 \S+, \S+, \S+ -> or\.b32|^mov\.b64 \{low, ",
     "half of a product with 0, in the first round of Philox"),
]
