#include <mm1.h>
#include <stdio.h>

int main(void)
{
    int result = mm1_adaptive_pool(MM1_BF16, NULL, NULL, NULL, 1, 1, 16, 8, 8, NULL);
    printf("%d %s\n", mm1_version(), mm1_error_string(result));
    return mm1_version() == MM1_VERSION && result == MM1_INVALID ? 0 : 1;
}
