/* cuBLAS (13): the sizes of every product are checked as in the real library; nothing is computed. */
enum { SUCCESS = 0, INVALID_VALUE = 7 };
typedef const void *in;
typedef long long stride;

static int checked(int ta, int tb, int m, int n, int k, int lda, int ldb, int ldc) {
  int a = ta ? k : m, b = tb ? n : k;
  if (m < 0 || n < 0 || k < 0) return INVALID_VALUE;
  if (lda < (a > 1 ? a : 1) || ldb < (b > 1 ? b : 1) || ldc < (m > 1 ? m : 1)) return INVALID_VALUE;
  return SUCCESS;
}

int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int lda, in B,
                   int ldb, in beta, void *C, int ldc) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasDgemm_v2(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int lda, in B,
                   int ldb, in beta, void *C, int ldc) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int lda,
                              stride sa, in B, int ldb, stride sb, in beta, void *C, int ldc,
                              stride sc, int count) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasSgemmBatched(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int lda, in B,
                       int ldb, in beta, void *C, int ldc, int count) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int at, int lda,
                 in B, int bt, int ldb, in beta, void *C, int ct, int ldc, int type, int way) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int at,
                               int lda, stride sa, in B, int bt, int ldb, stride sb, in beta,
                               void *C, int ct, int ldc, stride sc, int count, int type, int way) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}
int cublasGemmBatchedEx(void *h, int ta, int tb, int m, int n, int k, in alpha, in A, int at,
                        int lda, in B, int bt, int ldb, in beta, void *C, int ct, int ldc,
                        int count, int type, int way) {
  return checked(ta, tb, m, n, k, lda, ldb, ldc);
}

const char *cublasGetStatusName(int status) {
  return status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : "stub";
}
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }
int cublasCreate_v2(void **to) { static int token; *to = &token; return SUCCESS; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return SUCCESS; }
