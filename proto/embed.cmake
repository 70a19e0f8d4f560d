# A file as a C array: dd_descriptor_set[], dd_descriptor_set_len.
file(READ ${IN} hex HEX)
string(LENGTH "${hex}" digits)
math(EXPR bytes "${digits} / 2")
string(REGEX REPLACE "(..)" "0x\\1," body "${hex}")
string(REGEX REPLACE "(................................................................................)" "\\1\n" body "${body}")
file(WRITE ${OUT} "/* generated from the .proto files */
#include <stddef.h>
extern const unsigned char dd_descriptor_set[];
extern const size_t dd_descriptor_set_len;
const unsigned char dd_descriptor_set[] = {
${body}
};
const size_t dd_descriptor_set_len = ${bytes};
")
